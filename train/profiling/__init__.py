"""What a step spends its time and memory on: traces of torch.profiler, and what they say."""
