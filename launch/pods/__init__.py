"""``isorun cluster``: looks into the pods and files of a run on Kubernetes.

Programs run in a pod by ``kubectl exec``. The files of a run that has no pod any more are read by a
pod that this room makes for it.
"""
