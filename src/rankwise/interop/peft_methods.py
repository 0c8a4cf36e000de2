"""The table of peft_types: adding one is an entry here, written in the file of its family."""

from __future__ import annotations

from rankwise.interop import peft_methods_banks as banks
from rankwise.interop import peft_methods_lora as lora
from rankwise.interop import peft_methods_rotations as rotations
from rankwise.interop import peft_methods_updates as updates
from rankwise.interop.peft_method import PeftMethod

METHODS: dict[str, PeftMethod] = {
    "LORA": lora.LORA,
    "ADALORA": lora.ADALORA,
    "VERA": banks.VERA,
    "RANDLORA": banks.RANDLORA,
    "VBLORA": banks.VBLORA,
    "LOHA": updates.LOHA,
    "LOKR": updates.LOKR,
    "HIRA": updates.HIRA,
    "GRALORA": updates.GRALORA,
    "DELORA": updates.DELORA,
    "FOURIERFT": updates.FOURIERFT,
    "C3A": updates.C3A,
    "SHIRA": updates.SHIRA,
    "MISS": updates.MISS,
    "OFT": rotations.OFT,
    "BOFT": rotations.BOFT,
    "HRA": rotations.HRA,
    "IA3": rotations.IA3,
    "ROAD": rotations.ROAD,
}
WAYS_OUT = {
    "BONE": "peft removed it in 0.19 for MISS, whose tensors are the same: rename the keys bone_block to miss_block, and "
    "peft_type to MISS, keeping init_weights (True or 'bat')",
    "LN_TUNING": "it trains normalization layers whole: load it with peft, and save the model",
    "TRAINABLE_TOKENS": "it replaces rows of the embedding: load it with peft, and save the model",
}
OTHERWISE = "if it is of low rank, convert it to LORA with peft (save_as_lora) first"
