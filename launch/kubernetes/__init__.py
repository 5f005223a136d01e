"""The Kubernetes objects of a run, made from the templates under k8s/.

manifests, kustomize      ->  the templates, and the tool that combines them
values                    ->  the values of a run: image, nodes, command ...
rendering, checks         ->  the final objects, checked before they are printed or submitted
from_torchx, scheduler    ->  the TorchX scheduler ``kubernetes_job``
cluster, state, logs      ->  what the scheduler reads from the cluster
command_line, component   ->  ``isorun render``
"""
