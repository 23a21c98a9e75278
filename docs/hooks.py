"""What mkdocs does beside the pages: plots lie beside the numbers they are drawn from, outside of docs/."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE, INSIDE = "../benchmarks/results/", "plots/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every plot."""
    for path in sorted((Path(config.docs_dir) / OUTSIDE).resolve().glob("*.png")):
        files.append(File.generated(config, f"{INSIDE}{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to plots as they are right in the repository become right in the pages."""
    return markdown.replace(f"]({OUTSIDE}", f"]({INSIDE}")
