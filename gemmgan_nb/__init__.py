"""GeMM-GAN, chapter by chapter: the library that the notebooks in nbs/ export."""
