"""Turns links that leave the site into links to GitHub: a Markdown extension for mkdocs.yml."""

import os
from pathlib import PurePosixPath
from urllib.parse import urljoin, urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from zensical.extensions.context import ContextPreprocessor

ON_THE_SITE = {".md", ".png", ".gif"}


class GitHubLinks(Treeprocessor):
    """Resolves links to other files than pages and pictures as GitHub does."""

    def run(self, root: Element) -> None:
        """Changes the links of a page; without `REPO_URL` in the environment, none."""
        page = ContextPreprocessor.from_markdown(self.md)
        if page is None or "REPO_URL" not in os.environ:
            return
        here = f"{os.environ['REPO_URL']}/blob/main/{page.page.path}"
        for element in root.iter():
            for attribute in ("href", "src"):
                target = element.get(attribute, "")
                url = urlsplit(target)
                on_the_site = PurePosixPath(url.path).suffix in ON_THE_SITE
                if url.path and not url.scheme and not on_the_site:
                    element.set(attribute, urljoin(here, target))


class GitHubLinksExtension(Extension):
    """Registers `GitHubLinks`."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Adds it behind what makes links."""
        md.treeprocessors.register(GitHubLinks(md), "github_links", 0)


def makeExtension(**settings: object) -> GitHubLinksExtension:
    """Makes the extension."""
    return GitHubLinksExtension(**settings)
