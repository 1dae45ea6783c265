"""What runs on rows of logits, and on their entropies: Triton kernels on a GPU, compiled C++ or plain torch on a CPU.
`rows` chooses between them; `types` is what they all take and return."""
