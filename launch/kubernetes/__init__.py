"""The objects that a cluster is given for a run, all from the templates under k8s/.

manifests, kustomize  ->  the templates, and the tool that merges them
values                ->  what a run says: image, nodes, command ...
rendering, checks     ->  the final objects, looked over before anybody gets them
app, scheduler        ->  the same for TorchX: an app in, a job in the cluster
cluster, state, logs  ->  what the scheduler asks the cluster
"""
