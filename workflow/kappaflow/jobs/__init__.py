"""Bulk jobs: many small MPI calculations inside one allocation, none lost and none repeated.

Everything here runs on Python's standard library alone, so that a generated job needs nothing else where it runs.
"""
