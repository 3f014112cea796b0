"""Hook of mkdocs: the site's pages are Markdown files of the whole repository, each under its path in it.

So the links between them hold on the site as they do in a checkout, and nothing is kept twice.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PATTERNS = (
    "*.md",
    "LICENSE",
    "cluster/*",
    "kernels/*.md",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/prune_*",
    "docs/site.css",
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The pages, and what they link to, in place of the content of ``docs_dir``; the theme's files stay."""
    root = Path(config.config_file_path).parent
    paths = sorted({path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()})
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in paths]
    return Files(of_theme + pages)
