"""Other libraries' models and trainers with this package's kernels, one file a library.
Importing gem_kernels imports none of them."""
