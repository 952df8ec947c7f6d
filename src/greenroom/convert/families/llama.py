"""Llama and Mistral: dense, queries and keys stored as adjacent pairs."""

from greenroom.convert.families.base import Family


class Llama(Family):
    """The plainest family."""

    architecture = "llama"
    permuted = True
