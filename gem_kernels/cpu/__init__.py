"""The CPU backend: compiled on first use where there is a C++ compiler, plain torch where there is none."""
