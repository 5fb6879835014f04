"""
The measurements of arXiv 2603.00425, as functions on models, adapters and batches.

Models are causal language models of transformers, with or without adapters (of ours, or LoRA of PEFT). A batch is a
dictionary with `input_ids` and, if there is padding, `attention_mask`, each (rows, length); [`text_batches`] makes
batches of texts. Functions run models on one batch at a time, add up in float64, and hold nothing for all tokens.
Their results are dictionaries and lists that can be saved as JSON. They do not depend on the batch size, the side of
the padding or the order of the texts, apart from rounding.

`record(model, batch, names)` returns the hidden states of one batch, and a measure adds them up:

    total = 0.0
    for batch in batches:
        states = record(model, batch, ["post_mlp"])
        total += states[3, "post_mlp"].norm(dim=1).sum()  # block 3: (tokens, d), float64

`record_pair` does the same for a base model and a fine-tuned one, or for a model with and without its adapter.

The command line, files and pictures of each measure are in `trl_steer.eval.analysis`.
"""

from .adapters import scaled
from .batches import text_batches, token_batches
from .distill import Distilled, distill
from .drift import drift
from .expressivity import theorem_3_1
from .extract import Extracted, extract
from .first_order import first_order
from .inspection import effective_rank, inspect_adapter
from .mlp_share import mlp_share
from .norms import adapter_norms
from .oracle import oracle
from .proposition_4_2 import proposition_4_2
from .shifts import shift_similarity
from .splits import Split, split_rows
from .states import Block, States, blocks_of, check_same_shape, record, record_pair
from .subspaces import subspace_alignment
from .updates import Update, read_updates

__all__ = [
    "Block",
    "Distilled",
    "Extracted",
    "Split",
    "States",
    "Update",
    "adapter_norms",
    "blocks_of",
    "check_same_shape",
    "distill",
    "drift",
    "effective_rank",
    "extract",
    "first_order",
    "inspect_adapter",
    "mlp_share",
    "oracle",
    "proposition_4_2",
    "read_updates",
    "record",
    "record_pair",
    "scaled",
    "shift_similarity",
    "split_rows",
    "subspace_alignment",
    "text_batches",
    "theorem_3_1",
    "token_batches",
]
