"""The embedded world: generated scenes with captions and boxes, and small models of the full-size architectures.

scenes writes data sets: composer chooses what is in a scene, drawing paints it with pen and things, captions and
instructions put it into words. pretrain makes the models in weights/ by recipes. demo and studies run the suite's
scripts by steps.
"""
