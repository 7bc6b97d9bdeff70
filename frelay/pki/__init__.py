"""Certificates and CRLs: a small certificate authority, and what ``frelay init`` writes with it.

Nothing here runs inside the relay. The relay only ever reads PEM files, so any other authority (SPIRE, cert-manager,
a company's own) does as well; this one is there so that a first relay needs none.
"""
