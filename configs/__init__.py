"""Every knob, the environment and the error users see; imports none of our packages."""
