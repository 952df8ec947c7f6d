"""Run Mixture-of-Experts language models far larger than the GPU."""
