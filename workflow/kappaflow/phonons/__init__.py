"""Displacements, force constants, stability and conductivity; phono3py_api holds every call to phono3py."""
