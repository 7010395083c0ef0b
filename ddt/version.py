"""Version, distribution and addresses of the project."""

import importlib.metadata

__version__ = "0.1.0"
DISTRIBUTION = "ddt-diffusion"  # that installs this package; PyPI's ddt is another project


def project_urls() -> dict[str, str]:
    """Return [project.urls] of pyproject.toml by name; none where it is not installed."""
    try:
        urls = importlib.metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return dict(url.split(", ", 1) for url in urls)
