"""What may be asked for."""

from django.urls import path

from examples.wallet import views

urlpatterns = [
    path("", views.overview),
    path("healthz", views.health),
    path("accounts", views.open_account),
    path("accounts/<int:number>", views.account),
    path("accounts/<int:number>/deposits", views.deposit),
    path("transfers", views.transfer),
    path("pending-transfers", views.pending_transfer),
]
