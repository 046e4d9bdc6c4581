//! networking.k8s.io/v1 ServiceCIDR.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Meta;
use crate::fields;
use crate::wire::fields::Unknown;

/// networking.k8s.io/v1 ServiceCIDR: ranges from which an API server gives Services their cluster addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ServiceCidr {
    /// The metadata.
    pub metadata: Meta,
    /// The desired state.
    pub spec: ServiceCidrSpec,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json ServiceCidr { 1 metadata optional, 2 spec optional, ..unknown } }

/// The specification of a ServiceCIDR.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ServiceCidrSpec {
    /// The ranges, at most one of each family.
    pub cidrs: Vec<IpNet>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json ServiceCidrSpec { 1 cidrs optional, ..unknown } }
