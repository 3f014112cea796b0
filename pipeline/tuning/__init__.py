"""Search over the settings of mask learning with Ray Tune.

A space (``tune_spaces/``) names fields and what they may be; a trial is one learning run, judged by the held-out loss
of the hard mask at the sparsity that was asked for; the winner becomes a recipe.
"""
