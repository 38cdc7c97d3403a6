"""Tests of a policy: what `tfgpu test` reads, runs and compares. They need no GPU and start no program."""
