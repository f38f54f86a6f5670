"""The search of settings: its study and its trials."""
