"""The trailmark command, jobs and the local cluster."""
