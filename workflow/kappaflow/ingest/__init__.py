"""Finished calculations of others: found, read, matched with their displacements, and never trusted unread."""
