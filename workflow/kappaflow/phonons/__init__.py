"""Displacements, force constants, stability and conductivity; phono3py_api and phono3py_transport call phono3py."""
