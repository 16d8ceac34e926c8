"""The data factory: pairs for UNO from nothing but a text-to-image model; `python -m iclora.curate` runs it.

  options.py     what is asked for
  chain.py       the stages in order, and the run of one folder
  stages.py      what each stage makes of an item
  catalogue.py   one SQLite file: an item a row, and a row for every item and stage
  taxonomy.py    classes -> subjects in three moods -> scenes -> captions, from word lists or a language model
  seam.py        where a diptych is cut
  eyes.py        DINOv2, CLIP as a judge and OWLv2 as a detector, through transformers from local folders
  page.py        the summary page, its histograms and its sheets

Source: arXiv:2504.02160, supplement
"""
