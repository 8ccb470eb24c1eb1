"""The demo of methods: seven ways to fine-tune one 4-bit encoder, on the task of `word_polarity`."""
