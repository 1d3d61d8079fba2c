"""Can a potential be trusted? Its symmetries, derivatives, smoothness and precision, before a campaign uses it.

``crystals`` says on what, ``checks`` measures through the engines' interface alone, ``run`` does all of it, ``verdict``
compares with limits, ``figures`` draws.
"""
