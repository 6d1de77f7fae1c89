"""Texts as vectors of length 1, to tell how much alike they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_reheat.errors import ConfigError

MAX_FEATURES = 2**16
MAX_CORPUS_CHARS = 4000  # of a text: which n-grams are common is seen in its beginning


class TextEncoder(Protocol):
    """Texts as rows of length 1, so that the product of two is their cosine."""

    def encode(self, texts: Sequence[str]) -> Any:
        """[N, F], dense or sparse; a row is zero where there is nothing to tell of a text."""
        ...


def mean_similarity(encoder: TextEncoder, texts: Sequence[str], others: Sequence[str]) -> NDArray[np.float64]:
    """[N]: the mean cosine of each text to all `others`."""
    centre = np.asarray(encoder.encode(others).mean(axis=0), dtype=np.float64).ravel()
    return np.asarray(encoder.encode(texts) @ centre, dtype=np.float64).ravel()


class NGramEncoder:
    """TF-IDF over character n-grams (scikit-learn): needs no model, and sees wording only."""

    def __init__(self, corpus: Sequence[str]) -> None:
        """`corpus` decides which n-grams count, and how much."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(
            analyzer="char",
            ngram_range=(1, 5),
            lowercase=False,
            sublinear_tf=True,
            max_features=MAX_FEATURES,
            dtype=np.float32,
        )
        self._vectorizer = vectorizer.fit([text[:MAX_CORPUS_CHARS] for text in corpus])

    def encode(self, texts: Sequence[str]) -> Any:
        return self._vectorizer.transform(texts)

    @staticmethod
    def check(place: str) -> None:
        """
        Raises:
            ConfigError: scikit-learn is not installed; `place` is the key that asks for it.
        """
        if importlib.util.find_spec("sklearn") is None:
            raise ConfigError(
                f"{place}: TF-IDF needs scikit-learn, which is not installed (pip install scikit-learn); or name the folder of "
                "a Hugging Face text encoder"
            )


class ModelEncoder:
    """A Hugging Face model on the CPU: its last hidden states, in the mean over the tokens. Longer texts are cut."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self._limit = min(self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 512))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # one by one: without padding there is no need for a token to pad with
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> NDArray[np.float32]:
        ids = self._tokenizer(text, truncation=True, max_length=self._limit)["input_ids"]
        if not ids:
            return np.zeros(self._model.config.hidden_size, np.float32)
        mean = self._model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        return torch.nn.functional.normalize(mean, dim=0).numpy()

    @staticmethod
    def check(place: str, folder: str) -> None:
        """
        Raises:
            ConfigError: there is no model in the folder.
        """
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"{place}: {folder} is no folder with a Hugging Face model; name one, or tfidf")
