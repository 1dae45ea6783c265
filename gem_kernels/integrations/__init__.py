"""Hidden states and output head out of other libraries' models, one file a library.
Importing gem_kernels imports none of them."""
