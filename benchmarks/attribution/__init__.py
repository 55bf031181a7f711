"""The lab in which attribution methods are measured: a tiny Llama, facts about people that never were, and retrains."""
