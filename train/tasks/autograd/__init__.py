"""The task ``autograd``: a function with a hand-written derivative, and statistics of gradients."""
