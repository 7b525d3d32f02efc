"""The paper, as TRL's model cards cite it."""

import textwrap


PAPER = {
    "title": "TreePO: Bridging the Gap of Policy Optimization and Efficacy and Inference Efficiency with Heuristic "
    "Tree-based Modeling",
    "id": "2508.17445",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{li2025treepo,
            title        = {{TreePO: Bridging the Gap of Policy Optimization and Efficacy and Inference Efficiency
                            with Heuristic Tree-based Modeling}},
            author       = {Yizhi Li and others},
            year         = 2025,
            eprint       = {arXiv:2508.17445},
        }"""),
}
