"""A conversation in the terminal.

command.py    options of `sbedge chat` · loop.py reads, replies, reads again
branches.py   Chat: the conversations themselves, without a terminal · commands.py what a line with a slash does
kept.py       chats on disk, so that a killed one goes on · meter.py what a reply cost
editor.py     the line a person types · reply.py, markdown.py, painter.py the reply as it comes · terminal.py
"""
