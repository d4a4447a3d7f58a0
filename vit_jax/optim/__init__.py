"""Schedules, AdamW with parameter groups, EMA."""
