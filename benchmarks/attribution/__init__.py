"""The lab in which attribution methods are measured: a tiny Llama, facts about people who do not exist, and retrains."""
