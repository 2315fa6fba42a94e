"""The whole way in one command: a base policy warm-started by SFT, then GSPO."""
