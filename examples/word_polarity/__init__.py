"""The demo: fine-tuning a 4-bit encoder on word polarity, stock PEFT beside peft_kernels."""
