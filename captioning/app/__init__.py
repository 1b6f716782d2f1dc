"""The web page to play with, served by app.py to this machine's browser.

studio   what the page can do, as functions: captions and maps of pictures, scenes, two adapters side by side
scenes   pictures whose references are known: newly drawn, or of the validation data
server   HTTP around them: addresses, limits, errors as one line
page.*   markup, style and script of the page; it loads nothing from elsewhere

Captions, maps and scores come from ``captioning.api``, and so are those of the scripts.
"""
