"""The trainers and their configs: the only place, beside the command line, that knows transformers' trainer."""
