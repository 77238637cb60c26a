"""The papers behind methods, losses and options, as BibTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["PAPERS", "Paper", "cited_papers"]


@dataclass(frozen=True)
class Paper:
    key: str
    title: str
    author: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.author,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": self.url,
        }
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}\n}}"


def paper(key: str, arxiv: str, author: str, title: str) -> Paper:
    """A `Paper` whose key ends in its year."""
    return Paper(key, title, author, int("".join(filter(str.isdigit, key))), arxiv)


PAPERS: dict[str, Paper] = {
    "dpo": paper(
        "rafailov2023direct",
        "2305.18290",
        "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and "
        "Finn, Chelsea",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    ),
    "cpo": paper(
        "xu2024contrastive",
        "2401.08417",
        "Xu, Haoran and others",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    ),
    "simpo": paper(
        "meng2024simpo",
        "2405.14734",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    ),
    "alphapo": paper(
        "gupta2025alphapo",
        "2501.03884",
        "Gupta, Aman and others",
        "AlphaPO: Reward Shape Matters for LLM Alignment",
    ),
    "tpo": paper(
        "saeidi2024triple",
        "2405.16681",
        "Saeidi, Amir and others",
        "Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization",
    ),
    "ipo": paper(
        "azar2023general",
        "2310.12036",
        "Azar, Mohammad Gheshlaghi and others",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    ),
    "hinge": paper(
        "zhao2023slichf",
        "2305.10425",
        "Zhao, Yao and others",
        "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
    ),
    "exo_pair": paper(
        "ji2024towards",
        "2402.00856",
        "Ji, Haozhe and others",
        "Towards Efficient Exact Optimization of Language Model Alignment",
    ),
    "nca_pair": paper(
        "chen2024noise",
        "2402.05369",
        "Chen, Huayu and others",
        "Noise Contrastive Alignment of Language Models with Explicit Rewards",
    ),
    "robust": paper(
        "chowdhury2024provably",
        "2403.00409",
        "Ray Chowdhury, Sayak and others",
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    ),
    "bco_pair": paper(
        "jung2024binary",
        "2404.04656",
        "Jung, Seungjae and others",
        "Binary Classifier Optimization for Large Language Model Alignment",
    ),
    "sppo_hard": paper(
        "wu2024self",
        "2405.00675",
        "Wu, Yue and others",
        "Self-Play Preference Optimization for Language Model Alignment",
    ),
    "aot": paper(
        "melnyk2024distributional",
        "2406.05882",
        "Melnyk, Igor and others",
        "Distributional Preference Alignment of LLMs via Optimal Transport",
    ),
    "apo": paper(
        "doosterlinck2024anchored",
        "2408.06266",
        "D'Oosterlinck, Karel and others",
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    ),
    "discopop": paper(
        "lu2024discovering",
        "2406.08414",
        "Lu, Chris and others",
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
    ),
    "sigmoid_norm": paper(
        "lambert2024tulu",
        "2411.15124",
        "Lambert, Nathan and others",
        "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
    ),
    "f_divergence": paper(
        "wang2023beyond",
        "2309.16240",
        "Wang, Chaoqi and others",
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
    ),
    "ld_dpo": paper(
        "liu2024length",
        "2409.06411",
        "Liu, Wei and others",
        "Length Desensitization in Direct Preference Optimization",
    ),
    "wpo": paper(
        "zhou2024wpo",
        "2406.11827",
        "Zhou, Wenxuan and others",
        "WPO: Enhancing RLHF with Weighted Preference Optimization",
    ),
    "mpo": paper(
        "wang2024enhancing",
        "2411.10442",
        "Wang, Weiyun and others",
        "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization",
    ),
    "tr_dpo": paper(
        "gorbatovski2024learn",
        "2404.09656",
        "Gorbatovski, Alexey and others",
        "Learn Your Reference Model for Real Good Alignment",
    ),
}

SAME_PAPER = {"aot_unpaired": "aot", "apo_zero": "apo", "apo_down": "apo", "tpo-l": "tpo"}
MIXED = {"sigmoid", "bco_pair", "sft"}
"""The losses of MPO: preference, quality and generation."""


def cited_papers(method: str, losses: Sequence[str], settings: Mapping[str, object]) -> list[Paper]:
    """The papers of a run, the method's first, each once.

    Args:
        method: ``dpo``, ``cpo`` or ``tpo``.
        losses: names of the losses.
        settings: options of the config; LD-DPO, WPO, TR-DPO and f-divergences are recognised by theirs.
    """
    reference_free = {"simpo", "alphapo"}
    own_nll = bool(settings.get("cpo_alpha", 1.0))
    names = [] if method == "cpo" and set(losses) <= reference_free and losses and not own_nll else [method]
    names += [SAME_PAPER.get(loss, loss) for loss in losses]
    names += [
        name
        for name, used in (
            ("mpo", set(losses) == MIXED),
            ("alphapo", bool(settings.get("alpha"))),
            ("f_divergence", settings.get("f_divergence_type", "reverse_kl") != "reverse_kl"),
            ("ld_dpo", settings.get("ld_alpha") is not None),
            ("wpo", bool(settings.get("use_weighting"))),
            ("tr_dpo", bool(settings.get("sync_ref_model"))),
        )
        if used
    ]
    return [PAPERS[name] for name in dict.fromkeys(names) if name in PAPERS]
