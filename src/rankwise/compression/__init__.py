"""A model into a smaller one: layer choice and budgets over approximations."""

from rankwise.compression.compress import compress_, rank_for
from rankwise.compression.deploy import DeployedLayer, Deployment, deploy_
from rankwise.compression.eora import compensate, eora
from rankwise.compression.factorized import Factorized
from rankwise.compression.layer_speed import slow_layers
from rankwise.compression.report import CompressionReport, LayerReport
from rankwise.compression.svd_llm import SVDLLM, svd_llm

__all__ = [
    "SVDLLM",
    "CompressionReport",
    "DeployedLayer",
    "Deployment",
    "Factorized",
    "LayerReport",
    "compensate",
    "compress_",
    "deploy_",
    "eora",
    "rank_for",
    "slow_layers",
    "svd_llm",
]
