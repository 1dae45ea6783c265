"""Rows on the CPU: C++ compiled on first use (`build`) where there is a compiler, plain torch where there is none.
The torch code runs on any device (backend="torch")."""
