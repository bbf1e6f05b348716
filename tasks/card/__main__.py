"""``python -m tasks.card``: writes the model card and its figures from the reports of the other stages."""

from tasks import atomic, paths, stage
from tasks.card import figures, text
from tasks.card.evidence import gather
from tasks.card.params import CardParams
from tasks.section import read_section


def main() -> None:
    params = read_section("card", CardParams)
    evidence = gather()
    with atomic.folder(paths.CARD) as folder:
        if evidence.config.content:
            figures.draw_architecture(evidence.config.content, folder / "architecture.png")
        if evidence.curve:
            figures.draw_curve(evidence.curve, folder / "curve.png")
        card = text.front_matter(evidence, params) + text.body(evidence, params)
        (folder / "README.md").write_text(card)


if __name__ == "__main__":
    stage.run(main)
