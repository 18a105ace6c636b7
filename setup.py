from configparser import ConfigParser

from setuptools import setup

config = ConfigParser()
config.read("settings.ini", encoding="utf8")
own = config["DEFAULT"]
setup(
    version=own["version"],
    install_requires=own["requirements"].split(),
    extras_require={extra: own[f"{extra}_requirements"].split() for extra in ("dev", "docs", "genesets", "llama", "parquet", "survival", "tensorboard")},
)
