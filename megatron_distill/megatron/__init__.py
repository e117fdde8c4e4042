"""The only package that knows Megatron: its CPU backend, models, arguments, forward step and training entry point."""
