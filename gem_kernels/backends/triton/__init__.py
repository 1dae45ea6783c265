"""The Triton kernels (`row_stats`, `span_scores`) and `catalogue`, which lists all of them so that they can be compiled
without a GPU. Imported only where a kernel runs."""
