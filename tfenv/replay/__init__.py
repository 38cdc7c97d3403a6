"""Runs what the audit log holds through another policy."""
