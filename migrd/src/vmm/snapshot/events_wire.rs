//! What waits to be delivered to a vCPU, between KVM's types and the wire's.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1, kvm_vcpu_events__bindgen_ty_2,
    kvm_vcpu_events__bindgen_ty_3, kvm_vcpu_events__bindgen_ty_4, kvm_vcpu_events__bindgen_ty_5,
};
use migr_proto::v1 as proto;

use super::WireError;
use super::vcpu_wire::{byte, present};

const EVENT_FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

pub(super) fn events_into_wire(events: kvm_vcpu_events) -> proto::VcpuEvents {
    let kvm_vcpu_events {
        exception:
            kvm_vcpu_events__bindgen_ty_1 { injected, nr, has_error_code, pending, error_code },
        interrupt,
        nmi,
        sipi_vector,
        flags,
        smi,
        triple_fault: kvm_vcpu_events__bindgen_ty_5 { pending: triple_fault_pending },
        reserved: _,
        exception_has_payload,
        exception_payload,
    } = events;
    let exception = proto::ExceptionEvent {
        injected: injected.into(),
        nr: nr.into(),
        has_error_code: has_error_code.into(),
        pending: pending.into(),
        error_code,
        has_payload: exception_has_payload.into(),
        payload: exception_payload,
    };
    let kvm_vcpu_events__bindgen_ty_2 { injected, nr, soft, shadow } = interrupt;
    let interrupt = proto::InterruptEvent {
        injected: injected.into(),
        nr: nr.into(),
        soft: soft.into(),
        shadow: shadow.into(),
    };
    let kvm_vcpu_events__bindgen_ty_3 { injected, pending, masked, pad: _ } = nmi;
    let nmi = proto::NmiEvent {
        injected: injected.into(),
        pending: pending.into(),
        masked: masked.into(),
    };
    let kvm_vcpu_events__bindgen_ty_4 { smm, pending, smm_inside_nmi, latched_init } = smi;
    let smi = proto::SmiEvent {
        smm: smm.into(),
        pending: pending.into(),
        smm_inside_nmi: smm_inside_nmi.into(),
        latched_init: latched_init.into(),
    };
    proto::VcpuEvents {
        exception: Some(exception),
        interrupt: Some(interrupt),
        nmi: Some(nmi),
        sipi_vector,
        flags,
        smi: Some(smi),
        triple_fault_pending: triple_fault_pending.into(),
    }
}

pub(super) fn events_from_wire(wire: &proto::VcpuEvents) -> Result<kvm_vcpu_events, WireError> {
    let proto::VcpuEvents {
        exception,
        interrupt,
        nmi,
        sipi_vector,
        flags,
        smi,
        triple_fault_pending,
    } = wire;
    if flags & !EVENT_FLAGS != 0 {
        return Err(WireError::Range { what: "the event flags", value: (*flags).into() });
    }
    let proto::ExceptionEvent {
        injected,
        nr,
        has_error_code,
        pending,
        error_code,
        has_payload,
        payload,
    } = *present("the exception", exception)?;
    Ok(kvm_vcpu_events {
        exception: kvm_vcpu_events__bindgen_ty_1 {
            injected: byte("exception injected", injected)?,
            nr: byte("exception number", nr)?,
            has_error_code: byte("exception has_error_code", has_error_code)?,
            pending: byte("exception pending", pending)?,
            error_code,
        },
        interrupt: interrupt_from_wire(present("the interrupt", interrupt)?)?,
        nmi: nmi_from_wire(present("the NMI", nmi)?)?,
        sipi_vector: *sipi_vector,
        flags: *flags,
        smi: smi_from_wire(present("the SMI", smi)?)?,
        triple_fault: kvm_vcpu_events__bindgen_ty_5 {
            pending: byte("triple fault pending", *triple_fault_pending)?,
        },
        reserved: [0; 26],
        exception_has_payload: byte("exception has_payload", has_payload)?,
        exception_payload: payload,
    })
}

fn interrupt_from_wire(
    wire: &proto::InterruptEvent,
) -> Result<kvm_vcpu_events__bindgen_ty_2, WireError> {
    let proto::InterruptEvent { injected, nr, soft, shadow } = *wire;
    Ok(kvm_vcpu_events__bindgen_ty_2 {
        injected: byte("interrupt injected", injected)?,
        nr: byte("interrupt number", nr)?,
        soft: byte("interrupt soft", soft)?,
        shadow: byte("interrupt shadow", shadow)?,
    })
}

fn nmi_from_wire(wire: &proto::NmiEvent) -> Result<kvm_vcpu_events__bindgen_ty_3, WireError> {
    let proto::NmiEvent { injected, pending, masked } = *wire;
    Ok(kvm_vcpu_events__bindgen_ty_3 {
        injected: byte("NMI injected", injected)?,
        pending: byte("NMI pending", pending)?,
        masked: byte("NMI masked", masked)?,
        pad: 0,
    })
}

fn smi_from_wire(wire: &proto::SmiEvent) -> Result<kvm_vcpu_events__bindgen_ty_4, WireError> {
    let proto::SmiEvent { smm, pending, smm_inside_nmi, latched_init } = *wire;
    Ok(kvm_vcpu_events__bindgen_ty_4 {
        smm: byte("SMI smm", smm)?,
        pending: byte("SMI pending", pending)?,
        smm_inside_nmi: byte("SMI smm_inside_nmi", smm_inside_nmi)?,
        latched_init: byte("SMI latched_init", latched_init)?,
    })
}
