"""perl-vlm: LoRA reward models and LoRA PPO for language and vision-language models, on one frozen base."""

__version__ = "0.1.0"
